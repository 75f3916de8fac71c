# A static site, if the competition has `site`: made again whenever an entry has finished, from the standings, and at
# the end from the final leaderboards. What has been published leaves a mark in results/site/.
rule publish_standings:
    input:
        "results/{track}/{entry}/closed.json",
    output:
        touch("results/site/{track}/{entry}"),
    log:
        "logs/site/{track}/{entry}.log",
    conda:
        "../envs/palio.yaml"
    params:
        competition=W.whole(),
        site=W.competition.site,
    shell:
        "( palio standings --competition {params.competition:q}"
        " && palio publish-site {params.site:q}"
        " --competition {params.competition:q}"
        " --leaderboards results/standings"
        " ) > {log:q} 2>&1"


rule publish_leaderboards:
    input:
        leaderboards=expand("results/leaderboard/{track}.json", track=W.tracks),
        standings=W.site_marks,
    output:
        touch("results/site/final"),
    log:
        "logs/site/final.log",
    conda:
        "../envs/palio.yaml"
    params:
        competition=W.whole(),
        site=W.competition.site,
    shell:
        "exec palio publish-site {params.site:q}"
        " --competition {params.competition:q}"
        " > {log:q} 2>&1"
