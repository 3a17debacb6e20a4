"""HTTP/1 connections with limits, between uvicorn's server and the ASGI application."""
