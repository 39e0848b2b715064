"""In which order: Prefect flows, triggers, configuration, the command line."""
