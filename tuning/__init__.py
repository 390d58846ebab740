"""Search spaces, measurement and export of tuned kernel configurations."""
