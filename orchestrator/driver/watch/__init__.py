"""A run on a terminal page, from the files of its work directory."""
