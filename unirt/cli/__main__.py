from unirt.cli import main

main()
