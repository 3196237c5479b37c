"""From a recipe to registered students: everything but the mathematics (`model`) and the rows (`data`)."""
