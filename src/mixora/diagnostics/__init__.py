"""What the routers do, as numbers, plots and a page."""
