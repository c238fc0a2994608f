"""Tools of algorithms that go through a model unit by unit: cached inputs, rounded weights, corrected passes."""
