"""Parsing and validation of requests: JSON to arrays, with errors that say where and what to send instead."""
