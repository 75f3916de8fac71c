rule score:
    input:
        again=W.score_again,
        records=lambda wildcards: W.records(wildcards.track),
    output:
        leaderboard="results/leaderboard/{track}.json",
        csv=report(
            "results/leaderboard/{track}.csv",
            category="Leaderboards",
            labels={"track": "{track}"},
        ),
        parquet="results/leaderboard/{track}.parquet",
        markdown="results/leaderboard/{track}.md",
        latex="results/leaderboard/{track}.tex",
        analysis="results/leaderboard/{track}.analysis.json",
    log:
        "logs/score/{track}.log",
    conda:
        "../envs/palio.yaml"
    resources:
        mem_mb=4096,
        runtime=60,
    params:
        competition=W.whole(),
        teams=lambda wildcards: W.teams(wildcards.track),
    shell:
        "exec palio score"
        " --competition {params.competition:q}"
        " --track {wildcards.track}"
        " > {log:q} 2>&1"


# No output and no input: runs whenever it is asked for, on whatever is finished then.
rule standings:
    log:
        "logs/standings.log",
    conda:
        "../envs/palio.yaml"
    params:
        competition=W.whole(),
    shell:
        "( palio standings --competition {params.competition:q}"
        " && palio report --competition {params.competition:q}"
        " --leaderboards results/standings --out results/standings/report"
        " ) 2>&1 | tee {log:q}"
