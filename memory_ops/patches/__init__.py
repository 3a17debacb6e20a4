"""Row patches: sparse differences that are added to what lookups in a value table return."""
