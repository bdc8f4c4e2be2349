"""How a shard folder is made: shard by shard, kept if a run stops, put in place at once; and how it is verified."""
