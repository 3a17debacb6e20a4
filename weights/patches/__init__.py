"""Row patches: sparse differences of value tables, stored in folders."""
