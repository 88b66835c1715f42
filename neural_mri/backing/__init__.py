"""What the processes stand on: settings, database, jobs, queue, events, storage, logs."""
