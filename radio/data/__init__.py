"""What a step sees: pictures, views, mosaics and the plan."""
