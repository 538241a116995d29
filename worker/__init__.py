"""The model side: claims sessions, prepares prompts, steps the engine, writes the logs."""
