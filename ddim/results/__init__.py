"""Records of measurements, and the tables, plots and pages made from them; needs no torch."""
