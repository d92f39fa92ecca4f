"""Who calls: thin adapters that convert, call memory and core, and convert back."""
