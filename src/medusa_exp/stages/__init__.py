"""The recipe of each stage, top to bottom: one module each, `run(config, out, session) -> metrics`."""
