"""Tests of server/http/transport."""
