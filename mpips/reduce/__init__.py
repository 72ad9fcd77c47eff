"""The reduction of a round's contributions and the step, at the server or slice by slice on every rank."""
