"""What a run is: the schema, loading and the registry. Imports only the standard library, pydantic and yaml."""
