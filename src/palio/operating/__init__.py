"""Running a competition for days: what happens to a step when machines fail, and what the organizer sees.

attempt       one try at a step: its record, its failure, and whether it may be tried again
controller    one Snakemake a folder: its lock, what a killed one left behind, notifications
hooks         what Snakemake has no setting for
jobstep       a job's Snakemake, started in the job's SLURM step
slurm         what SLURM's commands say
status        where every entry is; status_view shows it
overrides     the organizer's decisions: withdraw, retry
doctor        whether a site is ready for a competition
"""
