"""The packaged recipes, and the schema made from their types."""
