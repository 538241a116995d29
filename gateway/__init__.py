"""The stateless HTTP side: parses OpenAI requests, queues sessions, relays their logs."""
