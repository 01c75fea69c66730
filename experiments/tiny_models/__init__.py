"""The shipped models: how they are built and trained."""
