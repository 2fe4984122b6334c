"""Where prompts come from: sources of problems, their rendering, and an order that resumes by an integer."""
