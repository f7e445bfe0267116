from cellfast.cli import main

main()
