rule report:
    input:
        leaderboards=expand("results/leaderboard/{track}.json", track=W.tracks),
        analyses=expand("results/leaderboard/{track}.analysis.json", track=W.tracks),
    output:
        report=report(
            "results/report/index.html",
            category="Report",
            labels={"page": "leaderboards, their uncertainty, entries"},
        ),
        figures=report(
            directory("results/report/figures"),
            patterns=["{name}.svg"],
            category="Figures",
            labels={"figure": "{name}"},
        ),
        answers=directory("results/report/answers"),
    log:
        "logs/report.log",
    conda:
        "../envs/palio.yaml"
    resources:
        mem_mb=4096,
        runtime=60,
    params:
        competition=W.whole(),
    shell:
        "exec palio report" " --competition {params.competition:q}" " > {log:q} 2>&1"
