"""The HTTP application: routes, schemas, streams, metrics."""
