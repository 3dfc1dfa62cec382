"""Records of measurements, and the tables, plots and reports made from them; no torch here."""
