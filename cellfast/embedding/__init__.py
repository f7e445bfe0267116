"""Every cell of a screen to one row of features: one parquet file per plate."""
