"""Methods × seeds × data sets at equal parameters: the runs, the queue that makes them, what they show."""
