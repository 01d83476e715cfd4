"""The recipes of the stages, one module each: `run(config, out, session) -> metrics`."""
