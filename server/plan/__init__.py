"""Memory and speed of a deployment, computed before there is one."""
