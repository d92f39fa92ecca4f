"""The reference: every formula of core/ as it stands, on NumPy. Nothing is accelerated here."""
