"""What a table says: columns, names, wells, plates, batches, doses, treatments, controls, and the one reader of tables
(docs/tables.md)."""
