"""The worker: takes tickets, runs the scanner on the models it holds, stores results, says how it goes."""
