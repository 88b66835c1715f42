"""The API: validates, records, announces, replays events, serves results. Computes nothing."""
