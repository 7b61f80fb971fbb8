"""Features of pictures into parquet."""
