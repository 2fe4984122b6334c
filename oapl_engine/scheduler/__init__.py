"""When to generate, train and publish: a pure core, driven by the real rooms or by a virtual clock."""
