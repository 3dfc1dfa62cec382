"""C++ loops that make a U-Net faster on CPUs; README.md here says when they pay."""
