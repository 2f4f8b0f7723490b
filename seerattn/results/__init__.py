"""Results: records, files of them, what can be said of samples, and where a record comes from."""
