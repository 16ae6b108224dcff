"""What is read: prompts, tables, the Hub."""
