# `snakemake --profile local published`: the tables of NeurIPS 2023 (downloaded, sha256 checked), recomputed,
# analysed like our own leaderboards, and the figures of the competition's paper.
rule published:
    output:
        report="results/published/report/index.html",
        figures=directory("results/published/report/figures"),
    log:
        "logs/published.log",
    retries: 2  # a download; what has arrived is kept
    conda:
        "../envs/palio.yaml"
    resources:
        mem_mb=4096,
        runtime=30,
    shell:
        "exec palio published resources/neurips2023 --fetch"
        " --out results/published"
        " > {log:q} 2>&1"
