# Palio: an LLM fine-tuning competition as a workflow.
#   snakemake --profile local              the demo competition on this machine
#   snakemake --profile slurm              the same on a cluster
#   snakemake --profile local standings    the provisional leaderboard, at any time
from snakemake.utils import min_version

min_version("9.27")


# --configfile replaces the demo's config instead of being merged into it; a job reads what its run planned
if "competition" not in config and workflow.is_main_process:

    configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/check.smk"
include: "rules/base_model.smk"
include: "rules/stage.smk"
include: "rules/curate.smk"
include: "rules/finetune.smk"
include: "rules/image.smk"
include: "rules/package.smk"
include: "rules/evaluate.smk"
include: "rules/score.smk"
include: "rules/report.smk"
include: "rules/site.smk"
include: "rules/published.smk"


# A check takes a second: two hundred of them need no two hundred jobs in the queue.
localrules:
    all,
    check_entry,
    standings,
    published,
    publish_standings,
    publish_leaderboards,


rule all:
    default_target: True
    input:
        expand("results/leaderboard/{track}.json", track=W.tracks),
        "results/report/index.html",
        ["results/site/final"] if W.competition.site else [],
