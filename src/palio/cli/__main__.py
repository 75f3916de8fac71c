from palio.cli import main

main()
