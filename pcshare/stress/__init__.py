"""stress: random helpers, sources, modes, joins, leaves and kills, with every byte and every resource checked.

plan draws the sequence from the seed, world makes the sources, actor is the program that acts and checks, crew holds
the processes, resources counts what the coordinator holds, round plays one coordinator's life, run repeats rounds until
the time is up. A seed repeats the sequence of actions; in which moment each happens is the scheduler's affair, so a
failure may need several runs of its seed.
"""
