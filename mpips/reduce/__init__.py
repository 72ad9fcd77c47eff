"""How a round's contributions are reduced and stepped on, at the server or slice by slice on every rank."""
