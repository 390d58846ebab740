"""Tuned kernel configurations, one YAML file for each GPU."""
