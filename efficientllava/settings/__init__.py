"""What a run is told: its fields, their checks, and how they are composed."""
