"""Updates as bytes: format version 1, specified in proto/FORMAT.md."""
