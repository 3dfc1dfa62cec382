"""Records of measurements, and the tables, plots and reports made from them; does not use torch itself."""
