from timstore.cli import main

main()
